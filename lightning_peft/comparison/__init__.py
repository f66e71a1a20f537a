"""Many runs under one protocol: what they are, doing them, and judging what came out."""
