"""The gateway: passes OpenAI-compatible traffic through untouched and logs it by workload."""
