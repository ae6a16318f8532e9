"""Weight formats: how a matrix is stored, gathered and multiplied. One file each."""
