"""What a run must keep: files, manifests, saving beside training, loading under another layout.

May import: the core, `device` to `runtime`.
"""
