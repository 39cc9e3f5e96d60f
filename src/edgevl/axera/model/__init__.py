"""A compiled model on the NPU: its files, its shape groups, and the calls that compute it."""
