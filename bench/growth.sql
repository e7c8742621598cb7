CREATE FOREIGN TABLE held (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h');
CREATE FOREIGN TABLE due (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
CREATE FOREIGN TABLE many (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h');
CREATE FOREIGN TABLE latency (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');

-- Makes keys one by one; returns how long one took at most, in milliseconds.  Or
-- counts so many keys that are there again and again.
CREATE FUNCTION make_keys(first int, last int, nkeys int DEFAULT 1000000000) RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
	began timestamptz;
	ended timestamptz := clock_timestamp();
	longest interval := '0';
BEGIN
	FOR n IN first .. last LOOP
		PERFORM sb_async_increment('key ' || n % nkeys, 1, 'growing');
		began := ended;
		ended := clock_timestamp();
		longest := greatest(longest, ended - began);
	END LOOP;
	RETURN extract(epoch FROM longest) * 1000;
END
$$;
