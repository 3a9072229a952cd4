"""What people see: progress bars, history, device statistics, status, reports."""
