"""The losses inside the trainers people have: open_clip, transformers, Lightning. Each module imports its library."""
