# Whose handler is called, and as whom it runs: the one that the owner of the
# buffer finds, as the owner, with the owner's settings; nobody else's, and
# nothing as long as the owner may not log in.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use HandlerTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_handler_node();

# The handler is found on the owner's own search path, and the owner's
# settings are in force inside.
sql(q{
CREATE ROLE keeper LOGIN;
CREATE SCHEMA keeper AUTHORIZATION keeper;
GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
GRANT ALL ON stored, poison TO keeper;
ALTER ROLE keeper SET search_path = keeper, public;
ALTER ROLE keeper SET work_mem = '7MB';
ALTER ROLE keeper IN DATABASE postgres SET lock_timeout = '77s';
CREATE TABLE surroundings (
	buffer text, session_role text, running_role text, path text, memory text, lock_timeout text);
GRANT ALL ON surroundings TO PUBLIC;

CREATE FUNCTION public.look_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'this is the wrong one'; END $$;
CREATE FUNCTION keeper.look_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO surroundings SELECT 'looks', session_user, current_user,
		current_setting('search_path'), current_setting('work_mem'),
		current_setting('lock_timeout')
$$;
CREATE FOREIGN TABLE looks (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'look_handler', interval '50ms');
ALTER FOREIGN TABLE looks OWNER TO keeper;
SELECT sb_increment(1, 1, 'looks');
});
wait_for($node, $db, "SELECT count(*) FROM looks",
	"the handler on the owner's search path is called", '0');
is(sql("SELECT * FROM surroundings"),
	'looks|keeper|keeper|keeper, public|7MB|77s',
	"it runs as the owner, in the owner's environment");

# Counts that are held when the buffer changes hands are stored as the new
# owner, though there is a worker that runs as the old one.
sql(q{
CREATE ROLE heir LOGIN;
ALTER FOREIGN TABLE looks OPTIONS (SET interval '1h');
SELECT sb_increment(2, 5, 'looks');
ALTER FOREIGN TABLE looks OPTIONS (SET handler 'keeper.look_handler');
GRANT USAGE ON SCHEMA keeper TO heir;
TRUNCATE surroundings;
ALTER FOREIGN TABLE looks OWNER TO heir;
SELECT sb_flush_all('looks');
});
wait_for($node, $db, "SELECT count(*) FROM looks",
	'after a change of owner the flush goes on', '0');
is(sql("SELECT session_role, running_role FROM surroundings"),
	'heir|heir', 'as the new owner');
sql("DROP FOREIGN TABLE looks");

# --- an owner that may not log in --------------------------------------------

# A role that cannot log in can own a buffer, but no worker can be it.
SKIP:
{
	skip 'owners need no LOGIN in this version', 7
	  if $node->pg_version >= 17;

	sql(q{
CREATE ROLE locked_out NOLOGIN;
CREATE FUNCTION guest_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('guest', ARRAY[k], ARRAY[n]) $$;
GRANT ALL ON stored, poison TO locked_out;
CREATE FOREIGN TABLE guest (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'guest_handler', interval '50ms', backoff '100ms');
ALTER FOREIGN TABLE guest OWNER TO locked_out;
});
	like(
		error_of("SELECT sb_start('guest')"),
		qr/locked_out.*HINT.*LOGIN/s,
		'sb_start refuses an owner without LOGIN, with a hint');
	sql("SELECT sb_increment(1, 4, 'guest')");
	wait_for($node, $db,
		"SELECT state = 'failing' AND last_error LIKE '%LOGIN%'
		 FROM sb_stat_buffers WHERE buffer = 'guest'",
		'increments are kept, and the view tells why they wait');
	is(sql("SELECT sb_count(1, 'guest')"), '4', 'nothing is lost');
	sql("ALTER ROLE locked_out LOGIN");
	wait_for($node, $db, "SELECT count(*) FROM guest",
		'once the role may log in they are stored by themselves', '0');
	is(sum_stored('guest'), '4', 'exactly');
	wait_for($node, $db,
		"SELECT state <> 'failing' FROM sb_stat_buffers WHERE buffer = 'guest'",
		'the buffer does not fail any more');
	sql("DROP FOREIGN TABLE guest");
}

# --- a handler of somebody else's -------------------------------------------

# A function that a stranger put in the owner's way does not get to run.
sql(q{
CREATE ROLE stranger LOGIN;
CREATE TABLE loot (who text);
GRANT ALL ON loot TO PUBLIC;
CREATE FUNCTION keeper.lured_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ INSERT INTO loot VALUES (current_user) $$;
ALTER ROLE keeper SET search_path = keeper, public;
CREATE FOREIGN TABLE lured (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'keeper.lured_handler', interval '50ms', backoff '100ms');
ALTER FOREIGN TABLE lured OWNER TO keeper;
GRANT CREATE, USAGE ON SCHEMA keeper TO stranger;
ALTER FUNCTION keeper.lured_handler(int, bigint) OWNER TO stranger;
});
like(error_of("SELECT sb_start('lured')"),
	qr/does not belong to the buffer's owner.*HINT/s,
	"sb_start refuses a stranger's handler");
sql("SELECT sb_increment(1, 4, 'lured')");
wait_for($node, $db,
	"SELECT state = 'failing' AND last_error LIKE '%does not belong%'
	 FROM sb_stat_buffers WHERE buffer = 'lured'",
	'so does the worker, and the view tells it');
is(sql("SELECT sb_count(1, 'lured'), (SELECT count(*) FROM loot)"),
	'4|0', "the stranger's function did not run, and the count is kept");
sql("GRANT stranger TO keeper");
wait_for($node, $db, "SELECT count(*) FROM lured",
	'of a role that the owner is a member of it is no stranger\'s', '0');
is(sql("SELECT who FROM loot"), 'keeper', 'and runs as the owner');
sql("DROP FOREIGN TABLE lured");

$node->stop('fast');
has_not_crashed($node, 'the server never crashed');

done_testing();
