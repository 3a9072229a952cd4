"""The launcher's torch side: the elastic agent of torch, with workers that our spawner starts. The only user of its classes."""
