-- What looks into a server from within; :probe is the library built from
-- bench/probe.c.

CREATE FUNCTION dump_area(distance bigint) RETURNS void
AS :probe LANGUAGE C VOLATILE;
CREATE FUNCTION callgrind_start() RETURNS void
AS :probe LANGUAGE C VOLATILE;
CREATE FUNCTION callgrind_stop() RETURNS void
AS :probe LANGUAGE C VOLATILE;
