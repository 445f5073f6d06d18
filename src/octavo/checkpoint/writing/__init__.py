"""Writing a checkpoint that appears when it is whole and survives a crash: `convert` plans, `writer` writes unit by unit."""
