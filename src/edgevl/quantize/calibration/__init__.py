"""What a model is calibrated on: conversations about pictures, and text."""
