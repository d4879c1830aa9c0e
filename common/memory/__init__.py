"""The memory plan: device bytes from a model's config.json and a job. No torch, no SQL; runs nothing on a device."""
