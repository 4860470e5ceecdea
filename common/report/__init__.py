"""Reports as one page: figures drawn by matplotlib, text filled into a template, nothing fetched from elsewhere."""
