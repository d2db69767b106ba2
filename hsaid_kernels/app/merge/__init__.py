"""`hsaid merge`: from the files of W0 and of a checkpoint to files of the weights, without a model."""
