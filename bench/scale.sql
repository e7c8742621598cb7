-- :buffers buffers of one owner, which all store to one table, and a list of
-- them.

CREATE TABLE scale_stored (key text, n bigint NOT NULL);
CREATE FUNCTION scale_store(key text, n bigint) RETURNS void LANGUAGE sql AS $$
	INSERT INTO scale_stored VALUES (key, n)
$$;

CREATE TABLE scale_buffers (buffer regclass NOT NULL);
SELECT format($format$
		CREATE FOREIGN TABLE scale_%1$s (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'scale_store', interval '1s');
		INSERT INTO scale_buffers VALUES ('scale_%1$s')$format$, i)
FROM generate_series(1, :buffers) AS i \gexec
