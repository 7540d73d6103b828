"""What `images.py` must know about file formats that Pillow does not."""
