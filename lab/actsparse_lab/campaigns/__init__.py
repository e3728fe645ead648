"""Many runs side by side, each campaign in one file."""
