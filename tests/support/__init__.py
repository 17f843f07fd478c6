"""What the tests share: a faithful interpreter, a memory sanitizer, ahead-of-time compilation."""
