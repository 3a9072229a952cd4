"""Where training runs: processes of this machine, or the processes that a launcher started."""
