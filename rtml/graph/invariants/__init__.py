"""What holds between two calls of `Core.handle`, each invariant a function that yields its offenders."""
