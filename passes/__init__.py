"""FX passes that rewrite a decoding graph to read the quantized cache, one transformation a file."""
