"""What runs models that were compiled for Axera's NPUs: runtimes, files, the engine."""
