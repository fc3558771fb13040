"""What unlearning left behind and what it damaged, measured before and after and against models that never knew."""
