"""Messages between driver, host and workers, and the channel that carries them; the only importer of zmq."""
