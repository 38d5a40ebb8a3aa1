"""Methods side by side, from one YAML: same policy, prompts, seeds and budget of responses."""
