"""fairseq's Transformer with the registry's attentions: one model, one architecture a rule and size.

``transformer_wmt_en_de`` becomes ``fwp_delta_wmt_en_de`` and so on, with fairseq's own numbers. Import after
``compatibility.install``.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase, TransformerModel
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn

from fwp_lightning.attention import RULES
from fwp_lightning.translation.attention import RegistryAttention
from fwp_lightning.translation.choice import PREFIX, default_choice, flatten, from_arguments

STOCK = "transformer"
ENCODER_DECODER_PREFIXES = ("transformer",)


class EncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer with the chosen self-attention."""

    def build_self_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        """Return the attention of the place encoder."""
        config = from_arguments(cfg).of_place("encoder")
        if config is None:
            return super().build_self_attention(embed_dim, cfg)
        return RegistryAttention(config, "encoder", embed_dim, cfg.encoder.attention_heads)


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with the chosen self- and cross-attention."""

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> nn.Module:
        """Return the attention of the place decoder."""
        config = from_arguments(cfg).of_place("decoder")
        if config is None:
            return super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return RegistryAttention(config, "decoder", embed_dim, cfg.decoder.attention_heads)

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        """Return the attention of the place cross."""
        config = from_arguments(cfg).of_place("cross")
        if config is None:
            return super().build_encoder_attention(embed_dim, cfg)
        return RegistryAttention(config, "cross", embed_dim, cfg.decoder.attention_heads, cfg.encoder.embed_dim)


class Encoder(TransformerEncoderBase):
    """fairseq's encoder of ``EncoderLayer``."""

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        """Return one layer."""
        return _checked(cfg, EncoderLayer(cfg, return_fc=self.return_fc))


class Decoder(TransformerDecoderBase):
    """fairseq's decoder of ``DecoderLayer``."""

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        """Return one layer."""
        return _checked(cfg, DecoderLayer(cfg, no_encoder_attn))


def _checked(cfg: Any, layer: nn.Module) -> nn.Module:
    """Refuse what fairseq's layer can do and these cannot, instead of leaving it out."""
    unsupported = {
        "--checkpoint-activations": cfg.checkpoint_activations,
        "--quant-noise-pq": cfg.quant_noise.pq > 0,
        "--cross-self-attention": cfg.cross_self_attention,
    }
    for option, given in unsupported.items():
        if given:
            raise ValueError(f"the fwp_ architectures have no {option}; leave it out")
    return layer


@register_model("fwp_transformer")
class FastWeightTransformer(TransformerModel):
    """fairseq's Transformer in which the places of ``TranslationAttention`` have an attention of the registry."""

    def __init__(self, args: Any, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__(args, encoder, decoder)
        self.register_buffer("dictionaries", _digest(encoder.dictionary, decoder.dictionary))

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add fairseq's options and one for every axis of the registry."""
        super().add_args(parser)
        for name, value in flatten(default_choice("delta")).items():
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=type(value), metavar=type(value).__name__.upper(), help=_help_of(name))

    @classmethod
    def build_model(cls, args: Any, task: Any) -> FastWeightTransformer:
        """Build the model; ``ValueError`` in one sentence for an attention that cannot be had."""
        from_arguments(args).check()
        return super().build_model(args, task)

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: nn.Embedding) -> Encoder:
        """Build the encoder."""
        return Encoder(args, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Any, embed_tokens: nn.Embedding) -> Decoder:
        """Build the decoder."""
        return Decoder(args, tgt_dict, embed_tokens, no_encoder_attn=args.no_cross_attention)

    def load_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> Any:
        """Load parameters; refuse those that were trained with other dictionaries: every word would mean another."""
        theirs = state_dict.get("dictionaries")
        if theirs is not None and not torch.equal(theirs.cpu(), self.dictionaries.cpu()):
            raise ValueError(
                "the checkpoint was trained with other dictionaries than those of the data; give the data-bin folder "
                "it was trained on, or make the data with its dictionaries (fwp fairseq-preprocess --srcdict --tgtdict)"
            )
        return super().load_state_dict(state_dict, strict, model_cfg, args)


def _digest(*dictionaries: Any) -> Tensor:
    """The SHA-256 of the words of dictionaries in their order, ``[32]`` bytes."""
    digest = hashlib.sha256("\n\n".join("\n".join(d.symbols) for d in dictionaries).encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).clone().to("cpu")


def _help_of(name: str) -> str:
    own = {
        f"{PREFIX}replaced": "places that get it: encoder,decoder,cross",
        f"{PREFIX}noncausal": "what encoder and cross get where the rule writes in an order: sum, softmax or refuse",
        f"{PREFIX}rule": "how a pair is written; the architecture's name says it already",
    }
    return own.get(name, f"{name.removeprefix(PREFIX)} of the attention (see: fwp list)")


def register_architectures() -> list[str]:
    """Register every rule in every size that fairseq's Transformer has; return the names. Known ones are left."""
    names = []
    sizes = [name for name, model in ARCH_MODEL_REGISTRY.items() if name.startswith(STOCK) and _is_stock(model)]
    for rule in RULES:
        for size in sizes:
            name = f"fwp_{rule}{size.removeprefix(STOCK)}"
            if name not in ARCH_MODEL_REGISTRY:
                register_model_architecture("fwp_transformer", name)(_architecture(rule, ARCH_CONFIG_REGISTRY[size]))
            names.append(name)
    return names


def _is_stock(model: type) -> bool:
    return model is TransformerModel


def _architecture(rule: str, stock: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
    def configure(args: Namespace) -> None:
        for name, value in flatten(default_choice(rule)).items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        if args.fwp_rule != rule:
            raise ValueError(f"--fwp-rule {args.fwp_rule} contradicts the architecture's rule {rule}; leave it out")
        stock(args)

    return configure


register_architectures()
