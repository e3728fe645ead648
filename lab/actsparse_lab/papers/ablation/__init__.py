"""The papers' three modifications, alone, in pairs and together; with 1-D decay and without."""
