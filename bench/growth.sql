CREATE FOREIGN TABLE held (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h');
CREATE FOREIGN TABLE due (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
CREATE FOREIGN TABLE many (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h');
CREATE FOREIGN TABLE latency (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
