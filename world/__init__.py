"""The miniature's world: scenes, captions, images of scenes, and the reader that finds the scene in an image. No torch."""
