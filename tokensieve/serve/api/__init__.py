"""OpenAI's routes, and those for monitoring. Each file has a router; what it needs comes from the application's state."""
