"""The miniature's world: scenes, captions, their pictures, and the reader that tells what a picture shows. No torch."""
