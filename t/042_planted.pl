# CREATE EXTENSION as a superuser in a schema where somebody else has planted
# things: what has a name that the script needs makes it fail, what is there to
# be found instead of PostgreSQL's own is not found, and nothing of it is run.
# The same for what statbuffer executes later, on a hostile search path.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;
$node->append_conf('postgresql.conf', q{
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;
$node->safe_psql('postgres', 'CREATE ROLE planter LOGIN');

my $databases = 0;

# A database with a schema where the planter may create what he likes, and has
# a trap: a function that notes who has run it.
sub new_database
{
	my ($planted) = @_;
	my $db = 'planted' . ++$databases;

	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, q{
		CREATE SCHEMA ext;
		GRANT USAGE, CREATE ON SCHEMA ext TO PUBLIC;
		CREATE TABLE public.trapped (who name, what text);
		GRANT ALL ON public.trapped TO PUBLIC;
		CREATE FUNCTION public.trap(what text) RETURNS boolean LANGUAGE sql AS
			'INSERT INTO public.trapped VALUES (current_user, what); SELECT true';
	});
	$node->safe_psql($db, $planted, extra_params => [ '-U', 'planter' ]);
	return $db;
}

# --- names that are taken ---------------------------------------------------

# Each makes the statement fail as a whole.  With CREATE OR REPLACE in the
# script, the function would have been the extension's, and the planter's.
foreach my $case (
	[ 'the handler of the wrapper',
		q{CREATE FUNCTION ext.statbuffer_fdw_handler() RETURNS void LANGUAGE sql AS $$SELECT public.trap('x')$$} ],
	[ 'the validator',
		q{CREATE FUNCTION ext.statbuffer_fdw_validator(text[], oid) RETURNS void LANGUAGE sql AS $$SELECT public.trap('x')$$} ],
	[ 'sb_increment()',
		q{CREATE FUNCTION ext.sb_increment(text, bigint, regclass) RETURNS void LANGUAGE sql AS $$SELECT public.trap('x')$$} ],
	[ 'sb_keys()',
		q{CREATE FUNCTION ext.sb_keys(regclass) RETURNS void LANGUAGE sql AS $$SELECT public.trap('x')$$} ],
	[ 'the function under the view',
		q{CREATE FUNCTION ext.sb_stat_get_buffer(oid) RETURNS text LANGUAGE sql AS $$SELECT public.trap('x'); SELECT 'x'$$} ],
	[ 'a view',
		q{CREATE VIEW ext.sb_stat_buffers AS SELECT 1 AS buffer} ],
	[ 'a table',
		q{CREATE TABLE ext.sb_stat_buffers (buffer text)} ])
{
	my ($name, $planted) = @$case;
	my $db = new_database($planted);
	my ($status, $out, $err) = $node->psql($db, 'CREATE EXTENSION statbuffer SCHEMA ext');

	isnt($status, 0, "$name is planted: CREATE EXTENSION fails");
	like($err, qr/already exists/, "$name: because it is there");
	is($node->safe_psql($db, q{
		SELECT (SELECT count(*) FROM pg_extension WHERE extname = 'statbuffer') + (SELECT count(*) FROM trapped)
			+ (SELECT count(*) FROM pg_foreign_server)}), '0', "$name: nothing was made or run");
}

# The script itself does not even try; nor does it change what it has not made.
my $sharedir = qx{pg_config --sharedir};
chomp $sharedir;
my @scripts = glob("$sharedir/extension/statbuffer--*.sql");
ok(@scripts > 0, 'the scripts are found');
foreach my $file (@scripts)
{
	my $script = slurp_file($file) =~ s/--.*//gr;

	unlike($script, qr/\bOR\s+REPLACE\b|\bIF\s+NOT\s+EXISTS\b/i, 'the script replaces nothing and takes nothing over')
	  if $file !~ /--.*--/;
	unlike($script, qr/\bSET\s+search_path\b|\bDO\s+\$/i, 'nor does it run code of its own');
}

# --- what could be found instead of PostgreSQL's own ------------------------

# Operators and functions for just the types that the view compares, tables with
# the names of the catalogs, and types with the names that the script uses.
my $traps = q{
	CREATE FUNCTION ext.trap_oid(oid, oid) RETURNS boolean LANGUAGE sql AS $$SELECT public.trap('oid'); SELECT true$$;
	CREATE OPERATOR ext.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = ext.trap_oid);
	CREATE FUNCTION ext.trap_name(name, text) RETURNS boolean LANGUAGE sql AS $$SELECT public.trap('name'); SELECT true$$;
	CREATE OPERATOR ext.= (LEFTARG = name, RIGHTARG = text, FUNCTION = ext.trap_name);
	CREATE FUNCTION ext.trap_names(name, name) RETURNS boolean LANGUAGE sql AS $$SELECT public.trap('names'); SELECT true$$;
	CREATE OPERATOR ext.= (LEFTARG = name, RIGHTARG = name, FUNCTION = ext.trap_names);
	CREATE FUNCTION ext.pg_get_userbyid(oid) RETURNS name LANGUAGE sql AS $$SELECT public.trap('userbyid'); SELECT 'x'::name$$;
	CREATE FUNCTION ext.sb_stat_get_buffer(bigint) RETURNS text LANGUAGE sql AS $$SELECT public.trap('get'); SELECT 'x'$$;
	CREATE FUNCTION ext.sb_stat_get_buffer(regclass) RETURNS text LANGUAGE sql AS $$SELECT public.trap('get'); SELECT 'x'$$;
	CREATE FUNCTION ext.sb_increment(varchar, int, regclass) RETURNS void LANGUAGE sql AS $$SELECT public.trap('increment')$$;
	CREATE TABLE ext.pg_class AS SELECT * FROM pg_catalog.pg_class;
	CREATE VIEW ext.pg_foreign_table AS SELECT * FROM pg_catalog.pg_foreign_table, public.trap('view');
	CREATE TABLE ext.pg_foreign_server AS SELECT * FROM pg_catalog.pg_foreign_server;
	CREATE TABLE ext.pg_foreign_data_wrapper AS SELECT * FROM pg_catalog.pg_foreign_data_wrapper;
	CREATE DOMAIN ext.text AS pg_catalog.text CHECK (public.trap('text'));
	CREATE DOMAIN ext.bigint AS pg_catalog.int8 CHECK (public.trap('bigint'));
	CREATE DOMAIN ext.int8 AS pg_catalog.int8 CHECK (public.trap('int8'));
	CREATE DOMAIN ext.regclass AS pg_catalog.regclass CHECK (public.trap('regclass'));
	CREATE DOMAIN ext.oid AS pg_catalog.oid CHECK (public.trap('oid'));
	CREATE DOMAIN ext.timestamptz AS pg_catalog.timestamptz CHECK (public.trap('time'));
	CREATE DOMAIN ext.interval AS pg_catalog.interval CHECK (public.trap('interval'));
	CREATE DOMAIN ext.anyelement AS pg_catalog.text CHECK (public.trap('any'));
	CREATE DOMAIN ext.fdw_handler AS pg_catalog.text CHECK (public.trap('fdw'));
	CREATE DOMAIN ext.record AS pg_catalog.text CHECK (public.trap('record'));
};

# The traps do catch who walks into them.
my $db = new_database($traps);
$node->safe_psql($db, q{SET search_path = ext, pg_catalog;
	SELECT 1 FROM pg_catalog.pg_class WHERE relname = 'x'::name AND oid = 0::pg_catalog.oid LIMIT 1;
	SELECT 'x'::text});
is($node->safe_psql($db, q{SELECT string_agg(DISTINCT what, ' ' ORDER BY what) FROM trapped WHERE who = 'postgres'}),
	'names oid text', 'traps that catch');
$node->safe_psql($db, 'TRUNCATE trapped');

# With the path as it is usually, and with one that has the schema first.
foreach my $path ('public', 'ext', 'ext, pg_catalog')
{
	$node->safe_psql($db, "SET search_path = $path; CREATE EXTENSION statbuffer SCHEMA ext");
	is($node->safe_psql($db, q{
		SELECT string_agg(DISTINCT pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid), ', ')
		FROM pg_depend e
			JOIN pg_depend d ON (d.classid, d.objid) = (e.classid, e.objid)
			LEFT JOIN pg_depend m ON (m.classid, m.objid, m.deptype) = (d.refclassid, d.refobjid, 'e')
			LEFT JOIN pg_rewrite r ON r.oid = d.objid
		WHERE e.refclassid = 'pg_extension'::regclass AND e.deptype = 'e' AND d.deptype = 'n' AND m.objid IS NULL
			AND d.refclassid <> 'pg_namespace'::regclass}),
		'', "path $path: the objects depend on nothing that was planted");
	is($node->safe_psql($db, q{
		SELECT string_agg(DISTINCT pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid), ', ')
		FROM pg_rewrite r
			JOIN pg_depend d ON (d.classid, d.objid) = ('pg_rewrite'::regclass, r.oid)
			LEFT JOIN pg_depend m ON (m.classid, m.objid, m.deptype) = (d.refclassid, d.refobjid, 'e')
		WHERE r.ev_class = 'ext.sb_stat_buffers'::regclass AND m.objid IS NULL}),
		'', "path $path: nor does the view");
	is($node->safe_psql($db, q{
		SELECT count(*) FROM pg_proc p, unnest(coalesce(proallargtypes, proargtypes::oid[]) || prorettype) AS t
			JOIN pg_type ON pg_type.oid = t
		WHERE typnamespace <> 'pg_catalog'::regnamespace AND probin LIKE '%statbuffer%'
			AND NOT EXISTS (SELECT FROM pg_depend d
				WHERE (d.classid, d.objid, d.deptype) = ('pg_type'::regclass, pg_type.oid, 'e'))}),
		'0', "path $path: the functions have PostgreSQL's types, or our own");

	# What statbuffer executes by itself, on that path: the default buffer, and
	# the option "stopped".
	$node->safe_psql($db, qq{
		CREATE FUNCTION public.handle_flush(key pg_catalog.text, counter pg_catalog.int8) RETURNS void
		LANGUAGE sql AS '';
		SET search_path = $path, public;
		SELECT ext.sb_start();
		SELECT ext.sb_increment('k'::pg_catalog.text, 1::pg_catalog.int8);
		SELECT ext.sb_count('k'::pg_catalog.text);
		SELECT ext.sb_drain();
		SELECT ext.sb_stop();
		SELECT ext.sb_start();
		SELECT * FROM ext.sb_stat_buffers;
		SELECT * FROM ext.sb_keys();
		SELECT * FROM ext.sb_default;
	});
	is($node->safe_psql($db, q{
		SELECT string_agg(atttypid::regtype::text, ' ' ORDER BY attnum) FROM pg_attribute
		WHERE attrelid = 'ext.sb_default'::regclass AND attnum > 0}),
		'text bigint', "path $path: the default buffer has PostgreSQL's types");
	is($node->safe_psql($db, q{SELECT string_agg(DISTINCT what, ' ') FROM trapped}), '', "path $path: nothing was run");
	$node->safe_psql($db, 'SET client_min_messages = error; DROP EXTENSION statbuffer CASCADE; DROP FUNCTION handle_flush');
}

# --- the default buffer's name ----------------------------------------------

# In a schema where anybody may create things, somebody may make what has the
# name of the default buffer.  Nobody counts in it whom he does not allow to;
# and it is plain to be seen whose it is.
$db = new_database('');
$node->safe_psql($db, q{
	CREATE EXTENSION statbuffer SCHEMA ext;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO planter;
	CREATE ROLE app LOGIN;
});
$node->safe_psql($db, q{
	CREATE FUNCTION ext.handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS $$SELECT public.trap('flush')$$;
	SET search_path = ext;
	SELECT sb_start()}, extra_params => [ '-U', 'planter' ]);
my ($status, $out, $err) = $node->psql($db, q{SELECT ext.sb_increment('k')}, extra_params => [ '-U', 'app' ]);
like($err, qr/permission denied for foreign table sb_default/, 'a default buffer that is somebody else\'s');
($status, $out, $err) = $node->psql($db, q{SET search_path = ext; SELECT sb_start()}, extra_params => [ '-U', 'app' ]);
like($err, qr/must be owner of foreign table sb_default/, 'is not started by others');
$node->safe_psql($db, q{SELECT ext.sb_increment('k')});
is($node->safe_psql($db, q{SELECT ext.sb_drain()}), 't', 'a superuser counts in it, as he could insert into any table');
is($node->safe_psql($db, q{SELECT who, what FROM trapped}), 'planter|flush', 'and its handler runs as the one who owns it');

$node->stop;
done_testing();
