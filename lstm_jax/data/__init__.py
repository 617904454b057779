"""Get text from files, TFDS datasets and downloads, of any size; read and write files safely."""
