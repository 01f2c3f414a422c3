"""Where pictures and captions come from: folders, tables, tars, packaged sets."""
