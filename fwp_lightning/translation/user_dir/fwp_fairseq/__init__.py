"""For fairseq's --user-dir: registers the architectures. fairseq imports it by its folder's name."""

from fwp_lightning.translation.compatibility import install

install()

import fwp_lightning.translation.architectures  # noqa: E402, F401 - importing it registers them
