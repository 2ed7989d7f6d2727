"""Tables of images: CSV files, and files of Arrow tables."""
