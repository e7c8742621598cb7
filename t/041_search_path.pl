# sb_start() and the worker look for a handler without a schema in the same
# places: where a session of the owner looks that begins now, whatever the
# caller's role, client and session have set.  What sb_start() says is compared
# with what the worker then does.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('path', q{shared_preload_libraries = 'statbuffer'}, q{search_path = 'in_conf, public'});

# A function that tells where it was found, in a schema for each place where a
# search path can be set.
my @places = qw(in_conf in_all in_db in_role in_both);
sql(q{
	CREATE ROLE owner LOGIN;
	CREATE ROLE caller LOGIN;
	GRANT owner TO caller;
	CREATE TABLE public.calls (place text, key text, counter bigint);
	GRANT ALL ON public.calls TO PUBLIC});
foreach my $place (@places, 'elsewhere', 'owner', 'caller')
{
	sql(qq{
		CREATE SCHEMA $place;
		GRANT USAGE ON SCHEMA $place TO PUBLIC;
		CREATE FUNCTION $place.store(text, bigint) RETURNS void LANGUAGE sql AS
		\$\$ INSERT INTO public.calls VALUES ('$place', \$1, \$2) \$\$});
}
$node->safe_psql($db, 'DROP FUNCTION in_conf.store(text, bigint)');
sql(q{
	CREATE FOREIGN TABLE public.hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '10ms', timeout '1h', backoff '10ms');
	ALTER FOREIGN TABLE public.hits OWNER TO owner;
	ALTER ROLE caller SET search_path = caller, public});

# The callers, each with something of its own on the path.
my @callers = (
	[ 'a session', q{SET search_path = elsewhere}, 'postgres', '' ],
	[ 'a session with an empty path', q{SET search_path = ''}, 'postgres', '' ],
	[ 'a role', '', 'caller', '' ],
	[ 'a client', '', 'postgres', '-c search_path=elsewhere' ],
	[ 'a session as the owner', q{SET ROLE owner; SET search_path = elsewhere}, 'caller', '' ]);
my $n = 0;

# All say what the worker does: it finds the handler there, or, with undef,
# nowhere.
sub agree
{
	my ($place, $what) = @_;

	foreach my $caller (@callers)
	{
		my ($name, $set, $role, $options) = @$caller;
		my $key = 'k' . ++$n;

		local $ENV{PGOPTIONS} = $options;
		my ($status, $out, $err) = $node->psql($db, "$set;\nSELECT public.sb_start('public.hits')",
			connstr => $node->connstr($db) . " user=$role");
		if (defined $place)
		{
			is($status . $err, '0', "$what, $name: sb_start() finds the handler");
		}
		else
		{
			like($err, qr/handler function store\(text, bigint\) does not exist/, "$what, $name: sb_start() finds no handler");
			next;
		}
		$ENV{PGOPTIONS} = '';
		sql("SELECT public.sb_increment('$key', 1, 'public.hits')");
		ok($node->poll_query_until($db, "SELECT EXISTS (SELECT FROM public.calls WHERE key = '$key')"), "$what, $name: the worker, too");
		is(sql("SELECT place FROM public.calls WHERE key = '$key'"), $place, "$what, $name: the same one");
	}
	return;
}

# --- where it can be set ----------------------------------------------------

# First nowhere but in the file, and then at each place that comes before the
# last one.  The worker that is there has the settings that it began with.
agree(undef, 'the file');
sql("SELECT public.sb_increment('waits', 1, 'public.hits')");
ok($node->poll_query_until($db, q{SELECT last_error ~ 'does not exist' FROM public.sb_stat_buffers WHERE relid = 'public.hits'::regclass}),
	'the file: nor does the worker');
sql(q{CREATE FUNCTION in_conf.store(text, bigint) RETURNS void LANGUAGE sql AS
	$$ INSERT INTO public.calls VALUES ('in_conf', $1, $2) $$});
agree('in_conf', 'the file, again');
is(sql(q{SELECT place FROM public.calls WHERE key = 'waits'}), 'in_conf', 'and what has waited is stored');
sql('ALTER ROLE ALL SET search_path = in_all');
agree('in_all', 'ALTER ROLE ALL');
sql(qq{ALTER DATABASE $db SET search_path = in_db});
agree('in_db', 'ALTER DATABASE');
sql('ALTER ROLE owner SET search_path = in_role');
agree('in_role', 'ALTER ROLE');
sql(qq{ALTER ROLE owner IN DATABASE $db SET search_path = in_both});
agree('in_both', 'ALTER ROLE IN DATABASE');

# "$user" is the owner.
sql(qq{ALTER ROLE owner IN DATABASE $db SET search_path = nowhere, "\$user", in_role});
agree('owner', '"$user"');

# What the owner may not use is not looked at.
sql('REVOKE USAGE ON SCHEMA owner FROM PUBLIC');
agree('in_role', 'without USAGE');

# Back to the file, and then to what the server has by itself.
sql(qq{
	ALTER ROLE owner IN DATABASE $db RESET search_path; ALTER ROLE owner RESET search_path;
	ALTER DATABASE $db RESET search_path; ALTER ROLE ALL RESET search_path});
$node->adjust_conf('postgresql.conf', 'search_path', undef);
$node->reload;
sql('GRANT USAGE ON SCHEMA owner TO PUBLIC');
agree('owner', 'the default');
sql(q{ALTER SYSTEM SET search_path = in_all});
$node->reload;
agree('in_all', 'ALTER SYSTEM');

# --- a worker that could not look --------------------------------------------

# It is cancelled while it waits to read the roles' settings.  It must read them
# again, though no one asks it to.  No new session can begin meanwhile.
sub poll_in
{
	my ($session, $query, $what) = @_;

	$session->query_safe(qq{
		DO \$\$ BEGIN
			FOR i IN 1 .. 100 * $PostgreSQL::Test::Utils::timeout_default LOOP
				EXIT WHEN ($query);
				PERFORM pg_sleep(0.01);
			END LOOP;
		END \$\$});
	is($session->query_safe("SELECT ($query)"), 't', $what);
	return;
}

sql('ALTER ROLE owner SET search_path = in_role');
my $session = $node->background_psql($db);
my $locker = $node->background_psql($db);
my $worker = sql(q{SELECT pid FROM public.sb_stat_buffers WHERE relid = 'public.hits'::regclass});
my $waits = "FROM pg_locks WHERE pid = $worker AND NOT granted AND relation = 'pg_db_role_setting'::regclass";
$session->query_safe(q{BEGIN; ALTER FOREIGN TABLE public.hits OPTIONS (SET timeout '2h')});
$locker->query_safe('BEGIN; LOCK pg_db_role_setting');
$session->query_safe('COMMIT');
poll_in($session, "SELECT count(waitstart) = 1 $waits", 'a worker that could not look: it waits');
my $since = $session->query_safe("SELECT waitstart $waits");
$session->query_safe("SELECT pg_cancel_backend($worker)");
poll_in($session, "SELECT NOT EXISTS (SELECT $waits AND waitstart IS NOT DISTINCT FROM '$since')", 'a worker that could not look: not any more');
$locker->query_safe('COMMIT');
$_->quit foreach $session, $locker;
wait_for($node, $db, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $worker", 'a worker that could not look: it has looked, and left');
agree('in_role', 'a worker that could not look');
sql('ALTER ROLE owner RESET search_path');

# --- what else the worker would not find ------------------------------------

sub refused
{
	my ($prepare, $error, $undo) = @_;
	my ($status, $out, $err) = $node->psql($db, "$prepare;\nSELECT public.sb_start('public.hits')");

	like($err, $error, "refused: $prepare");
	sql($undo);
	return;
}

refused(q{ALTER FOREIGN TABLE public.hits OPTIONS (SET handler 'caller.store'); REVOKE USAGE ON SCHEMA caller FROM PUBLIC},
	qr/permission denied for schema caller/, 'GRANT USAGE ON SCHEMA caller TO PUBLIC');
refused(q{ALTER FOREIGN TABLE public.hits OPTIONS (SET handler 'pg_temp.brief');
		CREATE FUNCTION pg_temp.brief(text, bigint) RETURNS void LANGUAGE sql AS ''},
	qr/handler function .*brief\(text,bigint\) is temporary/, q{ALTER FOREIGN TABLE public.hits OPTIONS (SET handler 'store')});
refused(qq{REVOKE CONNECT ON DATABASE $db FROM PUBLIC},
	qr/role "owner" does not have CONNECT privilege on database "$db"/, qq{GRANT CONNECT ON DATABASE $db TO PUBLIC});

# The caller's session is as it was.
is($node->safe_psql($db, q{SET search_path = elsewhere; SELECT public.sb_start('public.hits'); SHOW search_path; SELECT current_user}),
	"t\nelsewhere\npostgres", 'the session has its path and its role again');

# --- the default buffer -----------------------------------------------------

# It is the caller's, and so is the handler: the one that the caller would
# call, named with its schema.
sql(q{
	GRANT CREATE ON SCHEMA public TO caller;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO caller;
	CREATE FUNCTION elsewhere.handle_flush(text, bigint) RETURNS void LANGUAGE sql AS
	$$ INSERT INTO public.calls VALUES ('elsewhere', $1, $2) $$});
$node->safe_psql($db, q{SET search_path = elsewhere; SELECT public.sb_start()}, connstr => $node->connstr($db) . ' user=caller');
is(sql(q{SELECT relowner::regrole, ftoptions FROM pg_class JOIN pg_foreign_table ON ftrelid = oid WHERE relname = 'sb_default'}),
	'caller|{handler=elsewhere.handle_flush}', 'the default buffer has the handler of its maker');

$node->stop;
done_testing();
