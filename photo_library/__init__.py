"""For people who keep their pictures in a photo library: tags in XMP sidecars, and folders that are watched."""
