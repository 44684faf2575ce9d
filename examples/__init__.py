"""Applications on rtml: `examples.ocr` reads pages, `examples.faces` finds faces, `examples.vad` hears speech."""
