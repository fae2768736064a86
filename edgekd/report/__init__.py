"""What a run tells people: terminal table, HTML report, model card."""
