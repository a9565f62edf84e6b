"""The six stages of an iteration: one module and one public function each, named alike."""
