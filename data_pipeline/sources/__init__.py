"""Sources of images and captions: folders, tables, tars, packaged sets."""
