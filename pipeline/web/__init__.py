"""`ditc export --web DIR BUNDLE`: a static page that draws with a bundle, also of a pipeline, in the browser."""
