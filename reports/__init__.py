"""Tables, figures and one HTML page from the committed CSV files; needs no GPU, no torch and no MLflow store."""
