"""`ditc export --web DIR BUNDLE`: a static page that draws with a bundle's model in the browser."""
