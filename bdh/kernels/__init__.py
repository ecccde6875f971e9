"""The model's functions, faster. Only runners know these; the plain forms are in `bdh.model.modeling_bdh`."""
