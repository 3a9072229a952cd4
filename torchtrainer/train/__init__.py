"""From ``data_creator`` to ``optimizer.step()``: everything that one rank does."""
