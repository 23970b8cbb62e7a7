"""`ditc serve`: an engine behind the OpenAI images API and a web page, with a bounded queue."""
