"""What the laboratory's programs and trained models cost."""
