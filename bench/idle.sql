-- Buffers whose worker stays.

-- nothing due
CREATE FOREIGN TABLE idle_holding (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
CREATE FOREIGN TABLE idle_empty (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '10ms', timeout '1h');

-- 100 keys due each second, at any time in it
CREATE FOREIGN TABLE spread_million (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1s', jitter '10000s', timeout '1h');
CREATE FOREIGN TABLE spread_few (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1s', jitter '100s', timeout '1h');

-- 100 keys due each second, at once
CREATE FOREIGN TABLE once_million (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
CREATE FOREIGN TABLE once_few (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
