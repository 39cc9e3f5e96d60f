"""An OpenAI-compatible HTTP server: one model, many clients."""
