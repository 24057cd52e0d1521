"""Many runs side by side: variants, their scores, and claims tested against intervals."""
