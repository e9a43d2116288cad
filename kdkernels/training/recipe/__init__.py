"""Recipes: what one may say (config, schema, signatures), how it is read and completed (read, resolve), what documents
it (reference) and begins one (new). Needs neither torch nor DeepSpeed until the objective is built."""
